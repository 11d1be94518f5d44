"""What is known of a demand in seconds: weighted samples, and the ranks made of them."""
