"""Data made by models: sampled, judged, filtered, rewritten, compared."""
