//! The hub's memory: one SQLite database, written by one thread and read beside it.
//!
//! Everything that must survive is here and nowhere else; a crash at any point leaves either all of a change or
//! nothing of it. The writer takes what is queued, runs each piece in a savepoint of one `BEGIN IMMEDIATE`, and
//! answers after the one commit (with `synchronous=FULL`, so after the disk has it). Readers see the last
//! commit. Nothing here reads a clock; time comes in with the data.
//!
//! The interface is narrow on purpose: functions over a connection in the files beside this one, and
//! [`Store::write`] and [`Store::read`] to run them.
//!
//! | file | rows |
//! |---|---|
//! | [`schema`] | the tables and their migrations |
//! | [`app`] | apps, releases and who is a member |
//! | [`device`] | devices, their labels, presence and reports |
//! | [`desired`] | placements, generations and the outbox |
//! | [`rollout`] | rollouts, waves, assignments and the facts they are decided on |
//! | [`release`] | which releases are still needed |
//! | [`preview`] | what is known of the devices that a selector means |
//! | [`disruption_budget`] | disruption budgets and whom they hold for |
//! | [`lease`] | who may switch, and who waits for it |
//! | [`news`] | of which devices something changed |
//! | [`secret`] | secrets, the keys of devices, and what each device is sent |
//! | [`event`] | what happened |
//! | [`image`] | tags of the hub's own images |
//! | [`cache`] | what was fetched from other registries |
//! | [`registry`] | its manifests, uploads, and blobs that pushes count on |
//! | [`column`](mod@column) | between SQL and Rust types |

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, TransactionBehavior};
use tokio::sync::{Semaphore, oneshot};

pub mod app;
pub mod cache;
pub mod column;
pub mod desired;
pub mod device;
pub mod disruption_budget;
pub mod event;
pub mod image;
pub mod lease;
pub mod news;
pub mod preview;
pub mod registry;
pub mod release;
pub mod rollout;
pub mod schema;
pub mod secret;

/// The oldest SQLite that is trusted: 3.53.2, as later fixes reach back to bugs that lost WAL content.
const MIN_SQLITE: i32 = 3_053_002;

/// How many readers may run at once; SQLite readers never wait for the writer.
const READERS: usize = 4;

/// The most changes that share one commit: bounds how long the first of them waits.
const BATCH_MAX: usize = 256;

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file could not be made, or taken from others.
    #[error("failed to make {} readable for its owner alone", path.display())]
    Permissions {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file could not be opened.
    #[error("failed to open the database {}", path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// The SQLite that is linked is too old.
    #[error("SQLite {found} is linked; at least 3.53.2 is needed")]
    TooOld {
        /// Its version.
        found: &'static str,
    },
    /// A newer hub wrote the database.
    #[error(
        "the database has schema {found}, and this hub knows up to {known}: a newer hub wrote it; run that one, or restore a backup from before"
    )]
    Newer {
        /// In the file.
        found: i64,
        /// The newest known.
        known: i64,
    },
    /// SQLite failed.
    #[error("the database failed")]
    Sqlite(#[source] rusqlite::Error),
    /// The disk that holds the database is full.
    #[error("the disk that holds the database is full; make room, nothing was lost")]
    Full,
    /// The commit of a whole batch failed; nothing of it happened.
    #[error("the change could not be committed: {0}")]
    Commit(String),
    /// The store has been closed, or the change made it panic.
    #[error("the store is closing or gave up on this change; see the hub's log")]
    Stopped,
}

impl StoreError {
    fn of_commit(error: &rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DiskFull) => Self::Full,
            _ => Self::Commit(error.to_string()),
        }
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DiskFull) => Self::Full,
            _ => Self::Sqlite(error),
        }
    }
}

/// What a change leaves behind: called with `None` after the commit, or with why there was none.
type Answer = Box<dyn FnOnce(Option<&rusqlite::Error>) + Send>;

/// A change: whether it wants to be kept, and its answer. Without a connection it does not run, and only the
/// answer is wanted.
type Job = Box<dyn FnOnce(Option<&Connection>) -> (bool, Answer) + Send>;

/// A handle to the store. Cheap to clone; the writer ends when the last one is dropped.
#[derive(Clone)]
pub struct Store {
    jobs: mpsc::Sender<Job>,
    readers: Arc<Readers>,
    undone: Arc<AtomicU64>,
    commits: Arc<AtomicU64>,
}

struct Readers {
    path: PathBuf,
    permits: Arc<Semaphore>,
    idle: Mutex<Vec<Connection>>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("path", &self.readers.path)
            .finish_non_exhaustive()
    }
}

/// The writer's thread, to be waited for at the end.
#[derive(Debug)]
pub struct Writer(std::thread::JoinHandle<()>);

impl Writer {
    /// Waits until every [`Store`] is dropped and all queued changes are committed. Blocks.
    pub fn join(self) {
        if self.0.join().is_err() {
            tracing::error!("the store's writer panicked");
        }
    }
}

impl Store {
    /// Opens the database at `path`, making or migrating it. Blocks.
    ///
    /// # Errors
    ///
    /// When it cannot be opened, the linked SQLite is too old, or a newer hub wrote the file.
    pub fn open(path: &Path) -> Result<(Self, Writer), StoreError> {
        if rusqlite::version_number() < MIN_SQLITE {
            return Err(StoreError::TooOld {
                found: rusqlite::version(),
            });
        }
        let open = |source| StoreError::Open {
            path: path.to_owned(),
            source,
        };
        // It holds secrets. SQLite gives the files beside it the same permissions.
        only_for_owner(path).map_err(|source| StoreError::Permissions {
            path: path.to_owned(),
            source,
        })?;
        let mut connection = Connection::open(path).map_err(open)?;
        configure(&connection).map_err(open)?;
        schema::migrate(&mut connection)?;
        news::watch(&connection).map_err(open)?;
        let (undone, commits) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let counts = (Arc::clone(&undone), Arc::clone(&commits));
        let (jobs, queue) = mpsc::channel::<Job>();
        let writer = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || write_all(connection, &queue, &counts.0, &counts.1))
            .expect("a thread can be spawned while the program starts");
        let readers = Arc::new(Readers {
            path: path.to_owned(),
            permits: Arc::new(Semaphore::new(READERS)),
            idle: Mutex::new(Vec::new()),
        });
        let store = Self {
            jobs,
            readers,
            undone,
            commits,
        };
        Ok((store, Writer(writer)))
    }

    /// Grows whenever changes were undone that had seemed to succeed: their batch was not committed, or they panicked.
    /// Read within a change, it says whether that happened to one before.
    #[must_use]
    pub fn undone(&self) -> u64 {
        self.undone.load(Ordering::Acquire)
    }

    /// Transactions that were committed. Changes that come while one is being committed share the next.
    #[must_use]
    pub fn commits(&self) -> u64 {
        self.commits.load(Ordering::Relaxed)
    }

    /// Runs `change` in a transaction and returns after its commit. When it returns an error, nothing of
    /// it is kept.
    ///
    /// # Errors
    ///
    /// What `change` returns; [`StoreError`] when the commit fails.
    ///
    /// # Cancel safety
    ///
    /// The change happens or not regardless of whether the future is dropped.
    pub async fn write<T, E, F>(&self, change: F) -> Result<T, E>
    where
        F: FnOnce(&Connection) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            let result = connection.map(change);
            let keep = matches!(result, Some(Ok(_)));
            let answer: Answer = Box::new(move |failed| {
                let result = match (result, failed) {
                    (Some(result), None) => result,
                    (Some(Err(error)), Some(_)) => Err(error),
                    (_, Some(why)) => Err(StoreError::of_commit(why).into()),
                    (None, None) => Err(StoreError::Stopped.into()),
                };
                // The caller may have gone away; the change stands all the same.
                drop(sender.send(result));
            });
            (keep, answer)
        });
        self.jobs.send(job).map_err(|_| StoreError::Stopped)?;
        receiver.await.map_err(|_| StoreError::Stopped)?
    }

    /// Runs `query` on a consistent snapshot, beside the writer, on a thread that may block.
    ///
    /// # Errors
    ///
    /// What `query` returns; [`StoreError`] when there is no connection.
    pub async fn read<T, E, F>(&self, query: F) -> Result<T, E>
    where
        F: FnOnce(&Connection) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
    {
        let readers = Arc::clone(&self.readers);
        let task = async move {
            let permit = Arc::clone(&readers.permits)
                .acquire_owned()
                .await
                .map_err(|_| StoreError::Stopped)?;
            tokio::task::spawn_blocking(move || {
                // Held by the query: a caller that gives up frees no reader that still runs.
                let _held = permit;
                readers.run(query)
            })
            .await
            .map_err(|_| StoreError::Stopped)?
        };
        task.await
    }
}

impl Readers {
    fn run<T, E: From<StoreError>>(
        &self,
        query: impl FnOnce(&Connection) -> Result<T, E>,
    ) -> Result<T, E> {
        let idle = self.idle.lock().map_or(None, |mut idle| idle.pop());
        let connection = match idle {
            Some(connection) => connection,
            None => self.connect()?,
        };
        let snapshot = connection
            .unchecked_transaction()
            .map_err(StoreError::from)?;
        let result = query(&snapshot);
        drop(snapshot);
        if let Ok(mut idle) = self.idle.lock() {
            idle.push(connection);
        }
        result
    }

    fn connect(&self) -> Result<Connection, StoreError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection =
            Connection::open_with_flags(&self.path, flags).map_err(|source| StoreError::Open {
                path: self.path.clone(),
                source,
            })?;
        connection.busy_timeout(Duration::from_secs(5))?;
        plan_once(&connection)?;
        Ok(connection)
    }
}

/// Makes the file if it is missing, and takes it from everybody but its owner.
fn only_for_owner(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
    let file = std::fs::File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)?;
    let mode = file.metadata()?.permissions().mode();
    if mode & 0o077 == 0 {
        return Ok(());
    }
    for suffix in ["", "-wal", "-shm"] {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        match std::fs::set_permissions(&name, std::fs::Permissions::from_mode(0o600)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// WAL so that readers and the writer do not wait for each other; FULL so that a commit survives a power
/// loss, not only a crash; a small `cache_size`, as the hub must be happy on a Raspberry Pi.
fn configure(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(Duration::from_secs(5))?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "cache_size", -16_384)?;
    connection.pragma_update(None, "journal_size_limit", 64 << 20)?;
    connection.set_prepared_statement_cache_capacity(128);
    plan_once(connection)
}

/// Plans each statement once, whatever is bound to it (SQLite's query planner stability guarantee). Without it SQLite parses
/// and plans a statement anew when parameters change that its plan may depend on, which goes for some with sub-selects or
/// UNION, and the cache of statements clears all parameters after each use: that was 55 % of the writer's time while 10,000
/// devices reported (measured).
fn plan_once(connection: &Connection) -> rusqlite::Result<()> {
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    Ok(())
}

fn write_all(
    mut connection: Connection,
    queue: &mpsc::Receiver<Job>,
    undone: &AtomicU64,
    commits: &AtomicU64,
) {
    while let Ok(first) = queue.recv() {
        let mut answers = Vec::new();
        let failed = write_batch(&mut connection, first, queue, &mut answers, undone).err();
        if let Some(error) = &failed {
            undone.fetch_add(1, Ordering::AcqRel);
            tracing::error!(%error, "failed to commit a batch of changes");
        } else {
            commits.fetch_add(1, Ordering::Relaxed);
        }
        for answer in answers {
            answer(failed.as_ref());
        }
    }
    if let Err((_, error)) = connection.close() {
        tracing::warn!(%error, "failed to close the database");
    }
}

fn write_batch(
    connection: &mut Connection,
    first: Job,
    queue: &mpsc::Receiver<Job>,
    answers: &mut Vec<Answer>,
    undone: &AtomicU64,
) -> rusqlite::Result<()> {
    let begun = connection.transaction_with_behavior(TransactionBehavior::Immediate);
    let transaction = match begun {
        Ok(transaction) => transaction,
        Err(error) => {
            answers.push(first(None).1);
            return Err(error);
        }
    };
    let mut next = Some(first);
    while let Some(job) = next.take() {
        if let Err(error) = transaction.execute_batch("SAVEPOINT change") {
            answers.push(job(None).1);
            return Err(error);
        }
        let done =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job(Some(&transaction))));
        // The caller of one that panicked learns of it as its channel closes.
        if done.is_err() {
            undone.fetch_add(1, Ordering::AcqRel);
        }
        let keep = done.is_ok_and(|(keep, answer)| {
            answers.push(answer);
            keep
        });
        if !keep {
            // Fails when SQLite rolled everything back by itself (a full disk): then nothing of the batch stands.
            transaction.execute_batch("ROLLBACK TO change")?;
        }
        transaction.execute_batch("RELEASE change")?;
        if answers.len() < BATCH_MAX {
            next = queue.try_recv().ok();
        }
    }
    transaction.commit()
}

#[cfg(test)]
pub(crate) mod tests {
    use rusqlite::StatementStatus;

    use super::*;

    /// A migrated database in memory, for tests of row functions.
    pub(crate) fn memory() -> Connection {
        let mut connection = Connection::open_in_memory().unwrap();
        connection
            .pragma_update(None, "foreign_keys", true)
            .unwrap();
        plan_once(&connection).unwrap();
        schema::migrate(&mut connection).unwrap();
        news::watch(&connection).unwrap();
        connection
    }

    fn put(connection: &Connection, key: &str) -> Result<(), StoreError> {
        connection.execute("INSERT INTO meta (key, value) VALUES (?1, 1)", [key])?;
        Ok(())
    }

    fn keys(connection: &Connection) -> Result<i64, StoreError> {
        Ok(
            connection.query_row("SELECT count(*) FROM meta WHERE key LIKE 't%'", [], |row| {
                row.get(0)
            })?,
        )
    }

    #[tokio::test]
    async fn a_failed_or_panicking_change_leaves_nothing_and_harms_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hub.db");
        let (store, writer) = Store::open(&path).unwrap();
        let changes = (0..50).map(|number| {
            let store = store.clone();
            async move {
                store
                    .write(move |connection| {
                        put(connection, &format!("t{number}"))?;
                        assert_ne!(number % 10, 3, "a change that panics");
                        if number % 10 == 7 {
                            return Err(StoreError::Full);
                        }
                        Ok(())
                    })
                    .await
            }
        });
        let results = futures_util::future::join_all(changes).await;
        let count = |wanted: fn(&Result<(), StoreError>) -> bool| {
            results.iter().filter(|r| wanted(r)).count()
        };
        assert_eq!(
            count(|result| matches!(result, Err(StoreError::Stopped))),
            5
        );
        assert_eq!(count(|result| matches!(result, Err(StoreError::Full))), 5);
        assert_eq!(store.read(keys).await.unwrap(), 40);
        let commits = store.commits();
        assert!((1..=45).contains(&commits), "{commits} for 50 changes");
        drop(store);
        tokio::task::spawn_blocking(|| writer.join()).await.unwrap();
        let (store, _writer) = Store::open(&path).unwrap();
        assert_eq!(
            store.read(keys).await.unwrap(),
            40,
            "everything that was answered is on disk"
        );
    }

    #[tokio::test]
    async fn a_full_disk_is_said_to_be_one_and_what_was_there_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _writer) = Store::open(&dir.path().join("hub.db")).unwrap();
        let limit = |pages: i64| {
            store.write(move |connection| {
                connection.query_row(
                    &format!("PRAGMA max_page_count = {pages}"),
                    [],
                    |_| Ok(()),
                )?;
                Ok::<_, StoreError>(())
            })
        };
        store
            .write(|connection| put(connection, "t-before"))
            .await
            .unwrap();
        limit(1).await.unwrap();
        let fill = |key: &'static str| {
            store.write(move |connection| {
                let text = format!("{key}{}", "x".repeat(1 << 20));
                put(connection, &text)
            })
        };
        let (first, second) = tokio::join!(fill("t-first"), fill("t-second"));
        for result in [first, second] {
            assert!(matches!(result, Err(StoreError::Full)), "{result:?}");
        }
        assert!(store.undone() > 0, "who keeps something in memory is told");
        limit(1 << 20).await.unwrap();
        fill("t-after").await.unwrap();
        assert_eq!(store.read(keys).await.unwrap(), 2);
    }

    #[tokio::test]
    async fn a_statement_is_planned_once_whatever_is_bound_to_it() {
        let plans = |connection: &Connection| {
            let mut statement = connection.prepare(
                "SELECT app FROM lease_request WHERE device = ?1 UNION SELECT app FROM lease WHERE device = ?1",
            )?;
            for device in ["a", "b", "c"] {
                assert!(!statement.exists([device])?);
                // As rusqlite's cache of statements does.
                statement.clear_bindings();
            }
            Ok::<_, StoreError>(statement.get_status(StatementStatus::RePrepare))
        };
        let dir = tempfile::tempdir().unwrap();
        let (store, _writer) = Store::open(&dir.path().join("hub.db")).unwrap();
        assert_eq!(store.write(plans).await.unwrap(), 0);
        assert_eq!(store.read(plans).await.unwrap(), 0);
        // Otherwise this test says nothing.
        let connection = memory();
        connection
            .set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, false)
            .unwrap();
        assert!(plans(&connection).unwrap() > 0);
    }

    #[test]
    fn only_its_owner_reads_the_database_also_one_from_before() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hub.db");
        for _ in 0..2 {
            let (store, writer) = Store::open(&path).unwrap();
            for entry in std::fs::read_dir(dir.path()).unwrap().flatten() {
                let mode = entry.metadata().unwrap().permissions().mode();
                assert_eq!(mode & 0o777, 0o600, "{:?}", entry.path());
            }
            drop(store);
            writer.join();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        }
    }

    #[test]
    fn a_database_of_a_newer_hub_is_refused_untouched() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hub.db");
        drop(Store::open(&path).unwrap());
        let connection = Connection::open(&path).unwrap();
        connection.pragma_update(None, "user_version", 999).unwrap();
        drop(connection);
        let error = Store::open(&path).unwrap_err();
        assert!(
            matches!(error, StoreError::Newer { found: 999, .. }),
            "{error}"
        );
    }
}
