"""Train a model on a cluster: the same flags and config file as `kinoray train`.

ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform:models"}}' \\
    -- python jobs/train.py s3://bucket/set --out s3://bucket/runs/first
"""

import sys

from kinoray.cli import main
from kinoray.console import end_process

if __name__ == "__main__":
    end_process(lambda: main(["train", *sys.argv[1:]]))
