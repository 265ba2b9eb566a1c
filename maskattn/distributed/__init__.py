"""Context parallelism: the attention operations over a process group, for one slide on several processes.

Every process holds some rows of each sequence, as described by :class:`Shards`. The operations take it instead of a
``Packing``, and are otherwise called like those of ``maskattn``, by all processes together. Any backend of
``torch.distributed`` that sends the device's tensors between processes is suitable: gloo for the CPU, NCCL for GPUs.
"""

from maskattn.distributed.gradients import average_gradients
from maskattn.distributed.packed import packed_attention
from maskattn.distributed.reading import readout, token_relevance
from maskattn.distributed.shards import Shards, even_slice

__all__ = ["Shards", "average_gradients", "even_slice", "packed_attention", "readout", "token_relevance"]
