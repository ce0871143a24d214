import sys

from megatron_sse.launch.start import main

sys.exit(main(sys.argv[1:]))
