"""The command line with FSDP on CPUs, which torch can and accelerate does not offer: it takes them for GPUs."""

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer

from ta_llava.cli import app


create_accelerator = Trainer.create_accelerator_and_postprocess


def create_accelerator_that_shards(trainer: Trainer) -> None:
    PartialState().distributed_type = DistributedType.MULTI_GPU
    create_accelerator(trainer)


Trainer.create_accelerator_and_postprocess = create_accelerator_that_shards
app()
