"""Ray job: evaluate. `ray job submit --working-dir . -- python ray_jobs/evaluate.py key=value`"""

import sys

from aquarl.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
