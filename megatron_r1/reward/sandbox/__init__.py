"""Where untrusted programs run: what is asked (`job.py`), and the executors that answer."""
