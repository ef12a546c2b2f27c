"""Ray job: tokenizer. `ray job submit --working-dir . -- python ray_jobs/tokenizer.py key=value`"""

import sys

from aquarl.cli import main

if __name__ == "__main__":
    sys.exit(main(["tokenizer", *sys.argv[1:]]))
