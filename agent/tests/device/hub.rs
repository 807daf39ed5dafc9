//! The hub's end of the line: a mosquitto and a client that assigns, listens and acknowledges.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::Mutex;
use std::time::Duration;

use foreshore_protocol::frame;
use foreshore_protocol::message::{
    Command as Order, Event, EventKind, Events, Head, HeadApp, Presence, Reported, Windows,
};
use foreshore_protocol::release::Release;
use foreshore_protocol::topic::{self, Leaf};
use foreshore_protocol::{DeviceId, Digest, Version};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rumqttc::{AsyncClient, Event as Polled, Incoming, MqttOptions, PublishOptions, QoS};

#[derive(Debug, Default)]
struct Heard {
    reported: Option<Reported>,
    events: Vec<Event>,
    /// How many messages they came in.
    event_messages: usize,
    presences: Vec<Presence>,
}

/// For a service to become ready, in milliseconds: more than a slow machine takes.
const DEADLINE_MS: u64 = 20_000;

#[derive(Debug)]
pub struct Hub {
    broker: RefCell<Option<Child>>,
    config: PathBuf,
    pub port: u16,
    device: DeviceId,
    client: AsyncClient,
    heard: Rc<RefCell<Heard>>,
    acknowledges: Rc<Cell<bool>>,
}

/// A port that nobody listens on, and none that was given out here before: between the look and the broker's start another
/// test could be told the same one, and would talk to the wrong broker.
fn free_port() -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        if GIVEN.lock().unwrap().insert(port) {
            return port;
        }
    }
}

impl Hub {
    pub fn start(dir: &Path, device: &DeviceId) -> Self {
        let port = free_port();
        let config = dir.join("mosquitto.conf");
        std::fs::write(
            &config,
            format!("listener {port} 127.0.0.1\nallow_anonymous true\npersistence true\npersistence_location {}/\nautosave_interval 1\nautosave_on_changes true\n", dir.display()),
        )
        .unwrap();
        let mut options = MqttOptions::new("foreshore-hub", ("127.0.0.1", port));
        options
            .set_keep_alive(5)
            .set_clean_start(false)
            .set_session_expiry_interval(Some(600));
        options
            .set_broker_session_resume_policy(rumqttc::BrokerSessionResumePolicy::AllowBrokerOnly);
        let (client, mut events) = AsyncClient::builder(options).capacity(100).build();
        let (heard, acknowledges) = (
            Rc::new(RefCell::new(Heard::default())),
            Rc::new(Cell::new(true)),
        );
        let hub = Self {
            broker: RefCell::default(),
            config,
            port,
            device: device.clone(),
            client,
            heard,
            acknowledges,
        };
        hub.start_broker();
        let (client, heard, acknowledges) = (
            hub.client.clone(),
            Rc::clone(&hub.heard),
            Rc::clone(&hub.acknowledges),
        );
        let device = device.clone();
        tokio::task::spawn_local(async move {
            loop {
                match events.poll().await {
                    Ok(Polled::Incoming(Incoming::ConnAck(_))) => {
                        for leaf in [Leaf::Reported, Leaf::Event, Leaf::Presence] {
                            client
                                .try_subscribe(topic::device(&device, leaf), QoS::AtLeastOnce)
                                .unwrap();
                        }
                    }
                    Ok(Polled::Incoming(Incoming::Publish(message))) => {
                        let topic = String::from_utf8(message.topic.to_vec()).unwrap();
                        take(&mut heard.borrow_mut(), &topic, &message.payload);
                        if acknowledges.get() {
                            acknowledge(&client, &device, &heard.borrow());
                        }
                    }
                    Ok(_) => {}
                    Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                }
            }
        });
        hub
    }

    pub fn start_broker(&self) {
        let broker = Command::new("mosquitto")
            .arg("-c")
            .arg(&self.config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("mosquitto runs: install mosquitto, or run cargo xtask test");
        *self.broker.borrow_mut() = Some(broker);
    }

    pub fn stop_broker(&self) {
        if let Some(mut broker) = self.broker.borrow_mut().take() {
            broker.kill().unwrap();
            broker.wait().unwrap();
        }
    }

    /// The broker stands still: nothing that is sent to it is answered, and connections are neither made nor refused. Like a
    /// network that swallows everything.
    pub fn freeze_broker(&self, frozen: bool) {
        let broker = self.broker.borrow();
        let pid = i32::try_from(broker.as_ref().unwrap().id()).unwrap();
        let signal = if frozen {
            Signal::SIGSTOP
        } else {
            Signal::SIGCONT
        };
        nix::sys::signal::kill(Pid::from_raw(pid), signal).unwrap();
    }

    fn publish(&self, topic: String, bytes: Vec<u8>, retain: bool) {
        let options = PublishOptions::new(QoS::AtLeastOnce).retain(retain);
        self.client.try_publish(topic, bytes, options).unwrap();
    }

    pub fn publish_release(&self, digest: &Digest, bytes: &[u8]) {
        self.publish(topic::release(digest), bytes.to_vec(), true);
    }

    /// Assigns a release of which the manifest is there.
    pub fn assign(&self, generation: u64, release: &Release) {
        self.publish_release(&release.digest(), &release.to_canonical_json());
        self.assign_only(generation, release);
    }

    pub fn assign_only(&self, generation: u64, release: &Release) {
        self.assign_within(generation, release, DEADLINE_MS);
    }

    /// Assigns a release that must show within so many milliseconds that the way to the hub is open.
    pub fn assign_requiring_hub(&self, generation: u64, release: &Release, within: u64) {
        self.publish_release(&release.digest(), &release.to_canonical_json());
        self.assign_on(generation, release, DEADLINE_MS, Some(within));
    }

    /// The same with another deadline for progress, in milliseconds.
    pub fn assign_within(&self, generation: u64, release: &Release, deadline: u64) {
        self.assign_on(generation, release, deadline, None);
    }

    fn assign_on(
        &self,
        generation: u64,
        release: &Release,
        deadline: u64,
        require_hub_ms: Option<u64>,
    ) {
        let version = Version::from_numbers(1, generation).unwrap();
        let app = HeadApp {
            override_lock: false,
            windows: Windows::default(),
            max_restarts: 0,
            require_hub_ms,
            app: release.app.clone(),
            release: release.digest(),
            since: version,
            soak_ms: 300,
            progress_deadline_ms: deadline,
        };
        self.head(&Head {
            version,
            apps: vec![app],
            budgets: Vec::new(),
        });
    }

    pub fn withdraw(&self, generation: u64) {
        self.head(&Head {
            version: Version::from_numbers(1, generation).unwrap(),
            apps: Vec::new(),
            budgets: Vec::new(),
        });
    }

    fn head(&self, head: &Head) {
        self.publish(
            topic::device(&self.device, Leaf::Head),
            frame::encode(head),
            true,
        );
    }

    pub fn resync(&self) {
        self.publish(
            topic::device(&self.device, Leaf::Command),
            frame::encode(&Order::Resync),
            false,
        );
    }

    pub fn acknowledge(&self, whether: bool) {
        self.acknowledges.set(whether);
    }

    pub fn forget_events(&self) {
        self.heard.borrow_mut().events.clear();
    }

    pub fn reported(&self) -> Option<Reported> {
        self.heard.borrow().reported.clone()
    }

    /// How many events came in how many messages.
    pub fn events(&self) -> (usize, usize) {
        let heard = self.heard.borrow();
        (heard.events.len(), heard.event_messages)
    }

    /// The newest event of a kind.
    pub fn event(&self, kind: EventKind) -> Option<Event> {
        self.heard
            .borrow()
            .events
            .iter()
            .rev()
            .find(|event| event.kind == kind)
            .cloned()
    }

    pub fn newest_event(&self) -> Option<u64> {
        self.heard
            .borrow()
            .events
            .iter()
            .map(|event| event.seq)
            .max()
    }

    pub fn presences(&self) -> Vec<Presence> {
        self.heard.borrow().presences.clone()
    }
}

fn take(heard: &mut Heard, topic: &str, payload: &[u8]) {
    if topic.ends_with("/reported") {
        heard.reported = Some(frame::decode(payload).unwrap());
    } else if topic.ends_with("/event") {
        let Events { events, .. } = frame::decode(payload).unwrap();
        heard.events.extend(events);
        heard.event_messages += 1;
    } else if topic.ends_with("/presence") {
        heard.presences.push(frame::decode(payload).unwrap());
    }
}

fn acknowledge(client: &AsyncClient, device: &DeviceId, heard: &Heard) {
    let order = Order::Ack {
        event: heard
            .events
            .iter()
            .map(|event| event.seq)
            .max()
            .unwrap_or(0),
        reported: heard.reported.as_ref().map_or(0, |report| report.seq),
        unix_ms: 0,
    };
    let options = PublishOptions::new(QoS::AtLeastOnce);
    client
        .try_publish(
            topic::device(device, Leaf::Command),
            frame::encode(&order),
            options,
        )
        .unwrap();
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.stop_broker();
    }
}
