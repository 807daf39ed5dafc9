//! Images end to end: against Debian's `docker-registry`, filled by `skopeo` with what `umoci` built, and against
//! a server that lies. The tests need root: unpacking sets owners, and overlayfs is mounted to compare trees.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod attached;
mod bed;
mod compose;
mod credentials;
mod deltas;
mod hostile;
mod import;
mod load;
mod mirrors;
mod pull;
mod resume;
mod rot;
mod server;
mod signatures;
mod store;
mod tree;
