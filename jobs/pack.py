"""Pack videos into shards on a cluster: the same flags and config file as `kinoray pack`.

ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform:models"}}' \\
    -- python jobs/pack.py s3://bucket/videos --out s3://bucket/set
"""

import sys

from kinoray.cli import main
from kinoray.console import end_process

if __name__ == "__main__":
    end_process(lambda: main(["pack", *sys.argv[1:]]))
