"""Write docs/metrics.md from METRICS: `python tools/write_metrics_doc.py`."""

from pathlib import Path

from rto_megatron.metric_names import metrics_page

Path(__file__).parents[1].joinpath("docs/metrics.md").write_text(metrics_page())
