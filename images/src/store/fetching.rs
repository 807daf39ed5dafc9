//! Layers on their way in: several at a time, while the first of them is already being unpacked from the part that is
//! there.
//!
//! The bytes go through files ([`crate::partial`]), which the page cache makes cheap: memory stays the same however far
//! fetching is ahead of unpacking, and what came is still there after a power cut. What is read from here is not yet known
//! to be right. Its end is only ever reached when it is.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use foreshore_killpoint as killpoint;

use super::origin::Origin;
use super::{StageError, Store, io_error};
use crate::manifest::Descriptor;
use crate::{Digest, Reference};

/// Layers that are fetched at once; also how far fetching may be ahead of unpacking.
pub(super) const AT_ONCE: usize = 3;
/// How much of a blob is written between two looks at the disk.
const LOOK_BYTES: u64 = 1 << 20;
/// How often whoever waits tells of the progress.
const TELL_EVERY: Duration = Duration::from_millis(200);

/// The layers of one image.
pub(super) struct Fetching<'a> {
    store: &'a Store,
    origin: Origin<'a>,
    reference: &'a Reference,
    layers: &'a [Descriptor],
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    layers: Vec<Layer>,
    /// The layer that is being unpacked; those below need nothing more.
    unpacking: usize,
    /// Nobody waits any more.
    stopped: bool,
    /// Bytes that came, of all layers, since somebody asked.
    arrived: u64,
}

#[derive(Default)]
struct Layer {
    wanted: bool,
    /// A thread is at it, or was.
    taken: bool,
    /// Its file is there.
    opened: bool,
    written: u64,
    /// How often what had come turned out to be wrong.
    restarts: u32,
    end: Option<Result<(), StageError>>,
}

/// Why a reader stopped, inside of an [`io::Error`].
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("what had come was wrong, and is fetched again")]
    Restarted,
    #[error("the rest of it could not be fetched")]
    NotFetched,
}

/// Nobody waits any more.
#[derive(Debug, thiserror::Error)]
#[error("it is no longer wanted")]
struct Stopped;

impl<'a> Fetching<'a> {
    /// `wanted` says which layers are certainly needed; one that turns out to be is fetched when it is read.
    pub(super) fn new(
        store: &'a Store,
        origin: Origin<'a>,
        reference: &'a Reference,
        layers: &'a [Descriptor],
        wanted: &[bool],
    ) -> Self {
        let layers_state = wanted.iter().map(|wanted| Layer {
            wanted: *wanted,
            ..Layer::default()
        });
        Self {
            store,
            origin,
            reference,
            layers,
            state: Mutex::new(State {
                layers: layers_state.collect(),
                unpacking: 0,
                stopped: false,
                arrived: 0,
            }),
            changed: Condvar::new(),
        }
    }

    /// Fetches one layer after the other until there are none left or it is stopped; for a thread of its own.
    pub(super) fn work(&self) {
        while let Some(index) = self.next() {
            // Whoever waits for the layer would wait for ever if this thread just ended.
            let fetched = catch_unwind(AssertUnwindSafe(|| self.fetch(index)));
            let result = fetched.unwrap_or_else(|_| {
                let path = self.path(&self.layers[index].digest);
                let fault = io::Error::other("this is a fault of the program; its log has more");
                Err(io_error("fetch", &path, fault))
            });
            killpoint::reached("layer", "fetched");
            let mut state = self.lock();
            state.layers[index].end = Some(result);
            self.changed.notify_all();
        }
    }

    /// From now on layer `index` is unpacked, or all are.
    pub(super) fn unpacking(&self, index: usize) {
        self.lock().unpacking = index;
        self.changed.notify_all();
    }

    /// Ends all threads as soon as they notice: at the next piece that comes or fails to come in time.
    pub(super) fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// A layer's bytes as they come. `tell` is told how many came, of all layers.
    ///
    /// # Errors
    /// When its file is not there, and why.
    pub(super) fn reader<'f>(
        &'f self,
        index: usize,
        tell: &'f mut dyn FnMut(u64),
    ) -> Result<Arriving<'f>, StageError> {
        let mut state = self.lock();
        state.layers[index].wanted = true;
        self.changed.notify_all();
        loop {
            let layer = &mut state.layers[index];
            if layer.opened {
                break;
            }
            if let Some(Err(_)) = layer.end {
                return Err(layer
                    .end
                    .take()
                    .and_then(Result::err)
                    .expect("it was just looked at"));
            }
            state = self.wait(state, tell);
        }
        let restarts = state.layers[index].restarts;
        drop(state);
        let path = self.path(&self.layers[index].digest);
        let file = File::open(&path).map_err(|source| io_error("open", &path, source))?;
        Ok(Arriving {
            fetching: self,
            index,
            file,
            at: 0,
            restarts,
            tell,
        })
    }

    /// Waits until a layer is wholly there and right.
    ///
    /// # Errors
    /// Why it could not be fetched.
    pub(super) fn finished(
        &self,
        index: usize,
        tell: &mut dyn FnMut(u64),
    ) -> Result<(), StageError> {
        let mut state = self.lock();
        loop {
            match &state.layers[index].end {
                Some(Ok(())) => return Ok(()),
                Some(Err(_)) => {
                    let end = state.layers[index].end.take();
                    return end.expect("it was just looked at");
                }
                None => state = self.wait(state, tell),
            }
        }
    }

    /// How often what had come of a layer was wrong.
    pub(super) fn restarts(&self, index: usize) -> u32 {
        self.lock().layers[index].restarts
    }

    fn next(&self) -> Option<usize> {
        let mut state = self.lock();
        loop {
            if state.stopped || state.unpacking >= self.layers.len() {
                return None;
            }
            let ahead = state.unpacking..self.layers.len().min(state.unpacking + AT_ONCE);
            let layers = &mut state.layers;
            let free = |index: &usize| layers[*index].wanted && !layers[*index].taken;
            if let Some(index) = ahead.into_iter().find(free) {
                layers[index].taken = true;
                return Some(index);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Where the bytes of a layer are.
    fn path(&self, digest: &Digest) -> PathBuf {
        match self.origin {
            Origin::Registry(_) => self.store.partials.path(digest),
            Origin::Files(blobs) => blobs.path(digest),
        }
    }

    fn fetch(&self, index: usize) -> Result<(), StageError> {
        let layer = &self.layers[index];
        let client = match self.origin {
            Origin::Registry(client) => client,
            Origin::Files(_) => {
                let mut state = self.lock();
                state.layers[index].opened = true;
                state.layers[index].written = layer.size;
                return Ok(());
            }
        };
        let path = self.store.partials.path(&layer.digest);
        let disk = |source| io_error("write", &path, source);
        let mut partial = self
            .store
            .partials
            .blob(&layer.digest, layer.size)
            .map_err(disk)?;
        let mut state = self.lock();
        state.layers[index].opened = true;
        state.layers[index].written = partial.size();
        drop(state);
        self.changed.notify_all();
        let mut looked = partial.size();
        let mut watch = |size: u64| {
            let mut state = self.lock();
            if state.stopped {
                return Err(io::Error::other(Stopped));
            }
            let written = std::mem::replace(&mut state.layers[index].written, size);
            if size < written {
                state.layers[index].restarts += 1;
                looked = 0;
            }
            state.arrived += size.saturating_sub(written);
            drop(state);
            self.changed.notify_all();
            if size - looked >= LOOK_BYTES {
                looked = size;
                // Leaves the reserve alone: fails like a full disk once it would be touched.
                if self.store.room().is_ok_and(|room| !room.is_enough()) {
                    return Err(rustix::io::Errno::NOSPC.into());
                }
            }
            Ok(())
        };
        Ok(client.resume(self.reference, layer, &mut partial, &mut watch)?)
    }

    fn wait<'s>(
        &'s self,
        state: MutexGuard<'s, State>,
        tell: &mut dyn FnMut(u64),
    ) -> MutexGuard<'s, State> {
        let (mut state, _) = self
            .changed
            .wait_timeout(state, TELL_EVERY)
            .unwrap_or_else(PoisonError::into_inner);
        let arrived = std::mem::take(&mut state.arrived);
        if arrived > 0 {
            drop(state);
            tell(arrived);
            state = self.lock();
        }
        state
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change of it is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads what has come of a layer and waits for more.
pub(super) struct Arriving<'f> {
    fetching: &'f Fetching<'f>,
    index: usize,
    file: File,
    at: u64,
    restarts: u32,
    tell: &'f mut dyn FnMut(u64),
}

impl Read for Arriving<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut state = self.fetching.lock();
        let there = loop {
            let layer = &state.layers[self.index];
            if layer.restarts != self.restarts {
                return Err(io::Error::other(Broken::Restarted));
            }
            if self.at < layer.written {
                break layer.written - self.at;
            }
            match layer.end {
                Some(Ok(())) => return Ok(0),
                Some(Err(_)) => return Err(io::Error::other(Broken::NotFetched)),
                None => state = self.fetching.wait(state, self.tell),
            }
        };
        let arrived = std::mem::take(&mut state.arrived);
        drop(state);
        if arrived > 0 {
            (self.tell)(arrived);
        }
        let most = usize::try_from(there).map_or(buffer.len(), |there| there.min(buffer.len()));
        let count = self.file.read_at(&mut buffer[..most], self.at)?;
        if count == 0 && most > 0 {
            // It was cut to be fetched again since the lock was let go.
            return Err(io::Error::other(Broken::Restarted));
        }
        self.at += count as u64;
        Ok(count)
    }
}
