"""Where weights begin in memory, which decides the last bits of what a CPU makes of them."""

import torch

ALIGNMENT = 64  # bytes, of all that torch allocates on a CPU


def align(module: torch.nn.Module) -> None:
    """Copies weights that do not begin where torch's own would.

    Those that a library has read begin wherever its reader put them, and CPU kernels round by where their operands
    begin: two processes would not say the same. What `read_tensors` maps lies alike in all.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
