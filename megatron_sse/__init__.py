"""Training of long-context language models whose attention is replaced by SSE layers, on Megatron-Core.

Tensor names carry their dims, outermost first:
B batch, L tokens of a sequence, T flat tokens (t = b * L + l), H heads, K key dim, V value dim, N partitions,
D documents, S segments (the tokens of one document and bank), C tokens of a chunk.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout kernels/, parallel/, tools/ and configs/ stand beside this folder, in an installed package inside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "setup.cfg").is_file():
    __path__.append(str(_checkout))
