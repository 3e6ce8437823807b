"""Know what can be trusted: robustness, certificates, ranking, interpretability."""
