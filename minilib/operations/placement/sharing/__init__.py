"""One cluster for many tenants: quotas, borrowing and reclaiming, fair shares, and who gives way at the least loss."""
