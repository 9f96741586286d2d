"""The scaling wing: reads records or CSV tables of runs and fits scaling laws. It knows nothing of training, models or devices."""
