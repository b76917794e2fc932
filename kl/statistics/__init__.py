"""From tokens to the data set: means, intervals, breakdowns, differences of two runs."""
