"""`python -m tproxyd` is the command `tproxyd`."""

from tproxyd.daemon.cli import entry

if __name__ == "__main__":
    entry()
