//! The link against a broker of a few lines.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use super::{Birth, Incoming, Outgoing, QUEUE, Settings, channels, run};

/// CONNACK of MQTT 5: no session, success, no properties (MQTT 5.0, section 3.2).
const CONNACK: [u8; 5] = [0x20, 3, 0, 0, 0];

#[tokio::test]
async fn what_the_agent_has_to_send_does_not_begin_a_slow_connection_anew() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = format!(
        "broker = 'mqtt://{}'\njoin_token_file = '/nowhere'\n",
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
    let ((link, mut incoming), ends) = channels();
    tokio::spawn(run(settings, ends, birth));

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
        let message = Outgoing::Fetched(foreshore_protocol::Digest::of(b"a release"));
        link.0.send(message).await.unwrap();
    }
    answer.send(()).unwrap();
    let told = incoming.recv().await;
    assert!(matches!(told, Some(Incoming::Connected)), "{told:?}");
    drop((link, incoming));
    broker.await.unwrap();
}
