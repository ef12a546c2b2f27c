"""Ray job: the base stage. `ray job submit --working-dir . -- python ray_jobs/base.py key=value`"""

import sys

from aquarl.cli import main

if __name__ == "__main__":
    sys.exit(main(["base", *sys.argv[1:]]))
