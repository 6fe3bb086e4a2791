"""`pocd check`: what an operator has to mend, told before it costs anything. It changes nothing and starts nothing."""
