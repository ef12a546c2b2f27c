"""Ray job: pipeline. `ray job submit --working-dir . -- python ray_jobs/pipeline.py key=value`"""

import sys

from aquarl.cli import main

if __name__ == "__main__":
    sys.exit(main(["pipeline", *sys.argv[1:]]))
