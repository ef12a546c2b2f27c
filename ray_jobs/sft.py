"""Ray job: the sft stage. `ray job submit --working-dir . -- python ray_jobs/sft.py key=value`"""

import sys

from aquarl.cli import main

if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))
