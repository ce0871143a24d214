"""The settings of distillation: training beside a teacher."""

from megatron_sse.config.section import Name, NonNegative, Positive, Section


class DistillConfig(Section):
    """A teacher, and the weights of the parts of the loss."""

    teacher: Name
    logits: NonNegative = 1.0
    hidden: NonNegative = 0.0
    labels: NonNegative = 1.0
    temperature: Positive = 1.0
