"""`python -m sas_hf.eval`: lm-evaluation-harness's own command line, knowing the model type `sas_hf` and the suites.

    python -m sas_hf.eval run --model sas_hf --model_args pretrained=FOLDER --tasks sas_table1 --batch_size auto

The harness's command line asks for batches of one unless told otherwise. (Without this module, `lm_eval run
--include_path .../sas_hf/eval/tasks` knows the suites too, but not their average.)
"""

import lm_eval.tasks
from lm_eval.__main__ import cli_evaluate

import sas_hf.eval  # noqa: F401
from sas_hf.eval.suites import SuiteTaskManager


if __name__ == "__main__":
    # The command line makes its own index of tasks, from this name.
    lm_eval.tasks.TaskManager = SuiteTaskManager
    cli_evaluate()
