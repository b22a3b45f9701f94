"""What the commands do, step by step; each workflow ends in one result."""
