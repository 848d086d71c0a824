"""Records drawn as plotly figures, and a run directory written up as one HTML report.

Does not compute results and does not know torch: all it reads are records and the files of a run.
"""

from memgen_lens.viz import figures
from memgen_lens.viz.report import write_report

__all__ = ["figures", "write_report"]
