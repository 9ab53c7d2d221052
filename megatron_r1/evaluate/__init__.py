"""What a finished model can do: answers to the questions of tasks, judged; benchmarks and pass rates from them."""
