"""Direct Preference Optimization: data, log-probs, training and evaluation.

This package does not know where files are kept, and does not import prefect, dvc or mlflow. `tasks` and `flows`
import it and are never imported by it.
"""
