"""Ray job: the mid stage. `ray job submit --working-dir . -- python ray_jobs/mid.py key=value`"""

import sys

from aquarl.cli import main

if __name__ == "__main__":
    sys.exit(main(["mid", *sys.argv[1:]]))
