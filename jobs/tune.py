"""Run a sweep on a cluster: the same flags and config file as `kinoray tune`.

ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform:models"}}' \\
    -- python jobs/tune.py s3://bucket/set --out s3://bucket/sweeps/first
"""

import sys

from kinoray.cli import main
from kinoray.console import end_process

if __name__ == "__main__":
    end_process(lambda: main(["tune", *sys.argv[1:]]))
