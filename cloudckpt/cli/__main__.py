"""``python -m cloudckpt.cli`` is ``cloudckpt``."""

from cloudckpt.cli import main

if __name__ == "__main__":
    main()
