"""Did training help? Held-out loss, and answers compared with the references."""

from exactune.evaluate.answers import Sample
from exactune.evaluate.loss import HeldOutLoss, held_out_loss
from exactune.evaluate.score import Scores, evaluate

__all__ = ["HeldOutLoss", "Sample", "Scores", "evaluate", "held_out_loss"]
