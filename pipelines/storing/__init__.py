"""What the store is made of besides Lance: the lease, version records, publications, exports."""
