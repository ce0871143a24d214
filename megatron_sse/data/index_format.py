"""Megatron's format of an index, <prefix>.idx: what reading and writing it share.

The header holds MAGIC, the version (uint64), the code of the tokens' dtype (uint8), and the numbers of sequences and of
document bounds (uint64 each). Copied from Megatron-Core's indexed_dataset, whose import takes seconds.
"""

import struct

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
# After MAGIC.
HEADER = struct.Struct("<QBQQ")
# Of integer tokens, by the code in the header.
DTYPES = {
    code: np.dtype(kind)
    for code, kind in ((1, np.uint8), (2, np.int8), (3, np.int16), (4, np.int32), (5, np.int64), (8, np.uint16))
}
