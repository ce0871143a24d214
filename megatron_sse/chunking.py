"""How many rows the kernels compute at once. `plan` counts with the same numbers, and starts without torch."""

# Rows of a chunk of the torch forms.
SMALLEST, LARGEST = 8, 32
# Elements of queries in a block of chunks of the torch forms: few enough for a CPU's cache, or to bound a GPU's memory.
CPU_BLOCK, GPU_BLOCK = 1 << 18, 1 << 26
# Rows of a chunk of the Triton kernels.
CHUNK_SIZE = 64
# Log decays that the layers' health exponentiates at once: 64 MiB in fp32, whatever the length of the sequences.
DECAYS_AT_ONCE = 1 << 24


def choose_chunk_size(num_rows: int, num_segments: int) -> int:
    """Return the rows per chunk of the torch forms, a power of two: fewer where segments are short, since each fills
    complete chunks."""
    size = LARGEST
    while size > SMALLEST and 2 * size * num_segments > num_rows:
        size //= 2
    return size


def choose_chunks_per_piece(num_rows: int, programs_per_piece: int) -> int:
    """Return the chunks per piece of the Triton kernels: few enough that the pieces fill a large GPU, many enough that
    there are few states.

    It follows from sizes known on the host. programs_per_piece: how many programs share a piece (heads times blocks of
    the state). For example, with 65,536 rows (1,024 chunks) and 32 programs per piece, 32 pieces of 32 chunks.
    """
    wanted = max(1, 1024 // programs_per_piece)
    return max(4, -(-num_rows // (CHUNK_SIZE * wanted)))
