"""One thin Prefect task a stage, and what MLflow gets to see."""
