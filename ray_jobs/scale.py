"""Ray job: change the number of rollout workers of a live run.

`ray job submit --working-dir . -- python ray_jobs/scale.py 4 run.dir=...`
"""

import sys

from aquarl.cli import main

if __name__ == "__main__":
    sys.exit(main(["scale", *sys.argv[1:]]))
