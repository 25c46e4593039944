"""BLEU and chrF are sacrebleu's, and so is what two systems are said to differ by."""

import pytest
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from sas_hf.report.translation import corpus_scores, measured_scores, score_differences


REFERENCES = [f"el gato {number} ve un perro {number % 7} y {number % 5} libros viejos" for number in range(60)]
BETTER = [text.replace("perro", "can") if number % 3 else text for number, text in enumerate(REFERENCES)]
WORSE = [text.replace("ve un", "mira el") if number % 4 else f"no {text}" for number, text in enumerate(REFERENCES)]


def test_scores_and_their_spread_are_those_of_sacrebleu():
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        expected = metric.corpus_score(BETTER, [REFERENCES], n_bootstrap=1000)
        assert corpus_scores(BETTER, REFERENCES)[name] == expected.score
        found = measured_scores(BETTER, REFERENCES)[name]
        assert found.value == expected.score and found.signature == str(metric.get_signature())
        assert "bs:1000|seed:12345" in found.signature
        # Half of sacrebleu's 95 % interval is about two standard errors.
        assert found.stderr == pytest.approx(expected._ci / 1.96, rel=0.1)


def test_differences_are_those_of_sacrebleus_paired_bootstrap():
    metrics = {"bleu": BLEU(), "chrf": CHRF()}
    systems = [("first", WORSE), ("second", BETTER)]
    _, tested = PairedTest(systems, metrics, [REFERENCES], test_type="bs", n_samples=1000)()
    found = score_differences(WORSE, BETTER, REFERENCES)
    for name, label in (("bleu", "BLEU"), ("chrf", "chrF2")):
        before, after = tested[label]
        assert found[name].difference == after.score - before.score
        assert found[name].p_value == after.p_value
    assert found["bleu"].low < found["bleu"].difference < found["bleu"].high
    assert found["bleu"].low > 0 and found["bleu"].p_value < 0.05
    back = score_differences(BETTER, WORSE, REFERENCES)["bleu"]
    assert (back.low, back.high) == pytest.approx((-found["bleu"].high, -found["bleu"].low))


def test_the_same_translations_differ_by_nothing():
    for found in score_differences(BETTER, list(BETTER), REFERENCES).values():
        assert (found.difference, found.stderr, found.low, found.high, found.p_value) == (0, 0, 0, 0, 1)


def test_chinese_has_its_own_tokens_and_column_names_are_no_languages():
    def signature(language):
        return measured_scores(["el gato ve"], ["el gato ve"], language)["bleu"].signature

    assert "tok:zh" in signature("zh_CN")
    for name in (None, "es", "target", "zhong"):
        assert "tok:13a" in signature(name)


def test_one_pair_has_no_spread():
    one = measured_scores(["el gato"], ["el perro"])["chrf"]
    assert one.stderr == pytest.approx(0, abs=1e-9) and 0 < one.value < 100
