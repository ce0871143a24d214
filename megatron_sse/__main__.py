import sys

from megatron_sse.cli import main

sys.exit(main())
