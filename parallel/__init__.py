"""Everything that crosses ranks: device, process groups, who holds which tokens."""

import warnings

# Megatron-Core says this five times on import; the start-up banner says once what was picked and why.
warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
