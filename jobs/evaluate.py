"""Score a checkpoint on a cluster: the same flags and config file as `kinoray evaluate`.

ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform:models"}}' \\
    -- python jobs/evaluate.py s3://bucket/set --checkpoint s3://bucket/runs/first --out s3://bucket/eval
"""

import sys

from kinoray.cli import main
from kinoray.console import end_process

if __name__ == "__main__":
    end_process(lambda: main(["evaluate", *sys.argv[1:]]))
