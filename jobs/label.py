"""Label a library of videos on a cluster: the same flags and config file as `kinoray label`.

ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform:models"}}' \\
    -- python jobs/label.py s3://bucket/library/ --checkpoint s3://bucket/runs/first --out s3://bucket/labels
"""

import sys

from kinoray.cli import main
from kinoray.console import end_process

if __name__ == "__main__":
    end_process(lambda: main(["label", *sys.argv[1:]]))
