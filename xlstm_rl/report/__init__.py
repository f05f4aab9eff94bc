"""How a training run is shown: live, as a file of returns, as a curve and as a closing table."""

from xlstm_rl.report.live import LiveView
from xlstm_rl.report.returns import Returns, Row, read_returns
from xlstm_rl.report.table import Score, score_table

__all__ = ["LiveView", "Returns", "Row", "Score", "read_returns", "score_table"]
