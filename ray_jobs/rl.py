"""Ray job: the rl stage. `ray job submit --working-dir . -- python ray_jobs/rl.py key=value`"""

import sys

from aquarl.cli import main

if __name__ == "__main__":
    sys.exit(main(["rl", *sys.argv[1:]]))
