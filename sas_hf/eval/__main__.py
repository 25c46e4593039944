"""`python -m sas_hf.eval`: lm-evaluation-harness's own command line, with the model type `sas_hf` known to it.

    python -m sas_hf.eval run --model sas_hf --model_args pretrained=FOLDER --tasks arc_easy --batch_size auto

The harness's command line asks for batches of one unless told otherwise.
"""

from lm_eval.__main__ import cli_evaluate

import sas_hf.eval  # noqa: F401


if __name__ == "__main__":
    cli_evaluate()
