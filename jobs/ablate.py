"""Run the ablation study on a cluster: the same flags and config file as `kinoray ablate`.

python jobs/ablate.py --out runs/ablation --doc docs/ablation.md
ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform:models"}}' \\
    -- python jobs/ablate.py --out s3://bucket/runs/ablation --resources.num-workers 16
"""

import sys

from kinoray.cli import main

if __name__ == "__main__":
    sys.exit(main(["ablate", *sys.argv[1:]]))
