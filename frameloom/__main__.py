"""The `frameloom` command, also as `python -m frameloom`. Ctrl-C may come while it is still being imported."""

import sys

try:
    from frameloom.cli import main
except KeyboardInterrupt:
    sys.stderr.write("frameloom: interrupted; nothing was written\n")
    sys.exit(130)

if __name__ == "__main__":
    main()
