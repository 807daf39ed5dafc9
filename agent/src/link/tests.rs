//! The link against a broker of a few lines.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use foreshore_protocol::Digest;
use foreshore_protocol::message::{Event, EventKind, Events};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, oneshot};

use super::{
    Birth, DOWN, Incoming, Link, OUTGOING_MAXIMUM, Outgoing, QUEUE, Settings, channels, run,
};

/// CONNACK of MQTT 5: no session, success, no properties (MQTT 5.0, section 3.2).
const CONNACK: [u8; 5] = [0x20, 3, 0, 0, 0];

/// Far more than anything here takes.
const LONG: Duration = Duration::from_secs(60);

/// A link to this broker, and what it hears.
fn link_to(listener: &TcpListener, more: &str) -> (Link, mpsc::Receiver<Incoming>) {
    let config = format!(
        "broker = 'mqtt://{}'\njoin_token_file = '/nowhere'\n{more}",
        listener.local_addr().unwrap()
    );
    let settings = Settings {
        device: "press-1".parse().unwrap(),
        token: "token".to_owned(),
        hub: toml::from_str(&config).unwrap(),
        seed: 1,
    };
    let birth = || Birth {
        session: 1,
        boot: 1,
        version: None,
        reported_seq: 0,
        secrets_key: None,
        secrets: None,
    };
    let (agents, ends) = channels();
    tokio::spawn(run(settings, ends, birth));
    agents
}

/// A packet's first byte and body (MQTT 5.0, section 2.1); `None` when there are no more.
async fn packet(stream: &mut TcpStream) -> Option<(u8, Vec<u8>)> {
    let first = stream.read_u8().await.ok()?;
    let (mut length, mut shift) = (0, 0);
    loop {
        let byte = stream.read_u8().await.ok()?;
        length |= usize::from(byte & 127) << shift;
        shift += 7;
        if byte < 128 {
            break;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    Some((first, body))
}

/// Accepts a connection and what is said first on it: the subscriptions and the birth.
async fn greeted(listener: &TcpListener) -> TcpStream {
    let (mut stream, _) = listener.accept().await.unwrap();
    assert_eq!(packet(&mut stream).await.unwrap().0 >> 4, 1, "CONNECT");
    stream.write_all(&CONNACK).await.unwrap();
    for _ in 0..DOWN.len() + 2 {
        let (first, body) = packet(&mut stream).await.unwrap();
        let answer = match first >> 4 {
            // SUBACK of one subscription.
            8 => vec![0x90, 4, body[0], body[1], 0, 1],
            // PUBACK; the number comes after the topic.
            3 => {
                let topic = usize::from(u16::from_be_bytes([body[0], body[1]]));
                vec![0x40, 2, body[2 + topic], body[3 + topic]]
            }
            other => panic!("a packet of type {other} as a greeting"),
        };
        stream.write_all(&answer).await.unwrap();
    }
    stream
}

fn some_events(count: u64) -> Outgoing {
    let event = |seq| Event::new(seq, 1, 0, EventKind::Accepted, "x".repeat(500));
    Outgoing::Events(Events {
        kept_from: 1,
        events: (1..=count).map(event).collect(),
    })
}

/// A network that lets nothing through any more, as a release may make it: nothing comes back, and whatever the agent says to
/// find out keeps the client from sending a ping.
#[tokio::test]
async fn a_broker_that_answers_nothing_is_noticed_however_much_is_said_to_it() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (link, mut incoming) = link_to(&listener, "keepalive = '1s'\n");
    let broker = tokio::spawn(async move {
        let mut stream = greeted(&listener).await;
        // It reads and is silent.
        while packet(&mut stream).await.is_some() {}
    });
    assert!(matches!(incoming.recv().await, Some(Incoming::Connected)));
    let begin = Instant::now();
    let told = loop {
        assert!(begin.elapsed() < LONG, "nobody noticed");
        let _full = link.send(some_events(1));
        let moment = Duration::from_millis(300);
        if let Ok(told) = tokio::time::timeout(moment, incoming.recv()).await {
            break told;
        }
    };
    match told {
        Some(Incoming::Disconnected { why, .. }) => assert!(why.contains("not answer"), "{why}"),
        other => panic!("{other:?}"),
    }
    broker.await.unwrap();
}

/// The way up is so slow that the client waits in the middle of what it sends, and the agent goes on to say things.
#[tokio::test]
async fn nothing_is_lost_on_a_connection_that_takes_no_more_for_a_while() {
    const FETCHED: usize = 20;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(8).unwrap();
    let (link, mut incoming) = link_to(&listener, "");
    let (go_on, may_go_on) = oneshot::channel();
    let broker = tokio::spawn(async move {
        let mut stream = greeted(&listener).await;
        may_go_on.await.unwrap();
        let mut asked = BTreeSet::new();
        while asked.len() < FETCHED
            && let Some((first, body)) = packet(&mut stream).await
        {
            if first >> 4 == 8 {
                // Without its number.
                asked.insert(body[2..].to_vec());
            }
        }
        asked.len()
    });
    assert!(matches!(incoming.recv().await, Some(Incoming::Connected)));
    // As much as may be on its way: more than the buffers of both ends hold.
    for _ in 1..OUTGOING_MAXIMUM {
        link.0.send(some_events(115)).await.unwrap();
    }
    for number in 0..FETCHED {
        let release = Digest::of(number.to_string().as_bytes());
        link.0.send(Outgoing::Fetch(release)).await.unwrap();
        // The link takes it, and finds no room.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    go_on.send(()).unwrap();
    let asked = tokio::time::timeout(LONG, broker).await;
    assert_eq!(asked.expect("some never came").unwrap(), FETCHED);
}

#[test]
fn a_broker_is_late_from_when_it_was_asked_and_not_while_it_was_not() {
    let keepalive = Duration::from_secs(10);
    let mut unanswered = super::Unanswered::new(2 * keepalive);
    assert_eq!(unanswered.late_at(), None);
    unanswered.sent(&some_events(1));
    let first = unanswered.late_at().unwrap();
    unanswered.sent(&some_events(1));
    assert_eq!(unanswered.late_at(), Some(first));
    unanswered.heard(&rumqttc::Incoming::PubAck(
        rumqttc::mqttbytes::v5::PubAck::new(1, None),
    ));
    assert!(unanswered.late_at().is_some_and(|at| at >= first));
    unanswered.heard(&rumqttc::Incoming::PubAck(
        rumqttc::mqttbytes::v5::PubAck::new(2, None),
    ));
    assert_eq!(unanswered.late_at(), None);
    // It has read all that came before the ping.
    unanswered.sent(&some_events(1));
    unanswered.heard(&rumqttc::Incoming::PingResp);
    assert_eq!(unanswered.late_at(), None);
}

#[tokio::test]
async fn what_the_agent_has_to_send_does_not_begin_a_slow_connection_anew() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (link, mut incoming) = link_to(&listener, "");
    let (heard, is_heard) = oneshot::channel();
    let (answer, may_answer) = oneshot::channel();
    let broker = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut byte = [0];
        stream.read_exact(&mut byte).await.unwrap();
        assert_eq!(byte[0] >> 4, 1, "a CONNECT comes first");
        heard.send(()).unwrap();
        may_answer.await.unwrap();
        stream.write_all(&CONNACK).await.unwrap();
        // Until the other end closes it: a second connection would find nobody who accepts it.
        let mut rest = Vec::new();
        _ = stream.read_to_end(&mut rest).await;
    });
    is_heard.await.unwrap();
    // More than the channel holds, so the link has taken most of them.
    for _ in 0..3 * QUEUE {
        let message = Outgoing::Fetched(Digest::of(b"a release"));
        link.0.send(message).await.unwrap();
    }
    answer.send(()).unwrap();
    let told = incoming.recv().await;
    assert!(matches!(told, Some(Incoming::Connected)), "{told:?}");
    drop((link, incoming));
    broker.await.unwrap();
}
