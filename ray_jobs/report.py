"""Ray job: report. `ray job submit --working-dir . -- python ray_jobs/report.py key=value`"""

import sys

from aquarl.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
