"""One slide over several processes (context parallel): the attention operations over a process group.

Every process holds some rows of each sequence. :class:`Shards` says which; with it in the place of a ``Packing`` the
operations are called as those of ``maskattn``, by all processes at once. Any backend of ``torch.distributed`` serves
that sends the device's tensors from one process to another: gloo for the CPU, NCCL for GPUs.
"""

from maskattn.distributed.gradients import average_gradients
from maskattn.distributed.packed import packed_attention
from maskattn.distributed.reading import readout, token_relevance
from maskattn.distributed.shards import Shards, even_slice

__all__ = ["Shards", "average_gradients", "even_slice", "packed_attention", "readout", "token_relevance"]
