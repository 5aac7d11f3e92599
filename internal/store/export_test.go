package store

import "context"

// Look is what Keep does every few seconds.
func (o *Ownership) Look(ctx context.Context) error { return o.look(ctx) }
